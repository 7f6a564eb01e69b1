"""The words of the made-up world. Nothing here knows how they are put together.

No conversation has a tool, an id, a name, a street or a day of courier's in it (`tests/test_base.py` looks), so that
what a model learns of courier it learns from courier's demonstrations.
"""

# ruff: noqa: SIM905, E501  (a list of words reads better as text)

from __future__ import annotations

# Ids. Courier's are 700 to 899. The held-out ones score whether a number that was never trained on is copied.
TRAINED_IDS = tuple(str(n) for n in (*range(100, 600), *range(900, 1000)))
HELD_OUT_IDS = tuple(str(n) for n in range(600, 700))

# The things that a desk looks after.
THINGS = """
bike boat book card table room lesson meter ticket lease tent piano lamp drone camera garden roof oven clock kayak
truck trailer scooter violin sofa printer router laptop tablet pump heater mower ladder saddle jacket helmet suit
passport permit licence policy loan account invoice contract seat cabin desk shelf stall plot barn horse dog cat plant
painting statue carpet mirror window engine battery tyre bench bottle brush bucket cable candle canvas chain chair
chest coat coin couch crate cup curtain cushion dish drill drum dress fan fence file filter flag flute fork frame
fridge glove guitar hammer harness hat hook hose jar kettle key kite knife lens letter lift lock log map mask medal
mill mixer model mug net note oar pan pass pen phrase pipe plate pot puzzle quiz rack radio raft rake ring
robot rope rug safe sail sample saw scale scarf screw seal shed shirt shoe shovel sign sink skate ski sock spade spoon
stamp stool stove strap string swing tank tap tile tool torch tower toy track trap tray trumpet trunk tub tunnel
umbrella unit vase vest wallet watch wheel whistle wig wire yacht zip album anchor apron arch badge balloon banner
barrel basket bath beam bell belt bin blanket boiler bolt bowl box bridge bulb bus button cart
""".split()
HELD_OUT_THINGS = "telescope sled quilt canoe harp beehive lantern wagon turbine easel".split()
SYLLABLES = (
    "ba bel cor da dro fen gal gri ho jun ka kel lo mar mi nor ol pra qui ra ros sa sel ta tor u vel wi zan".split()
)
COMPANIES = (
    """
a rental shop,a club,a library,a workshop,a town office,a school,a museum,a farm,a small bank,a theatre,a harbour,a
hospital,a garage,a hotel,an archive,a market,a studio,a society,a registry,a shop for tools
""".replace("\n", " ")
    .strip()
    .split(",")
)
LOGIN = """
member code key badge account birthday city word number ticket colour street room team secret phone PIN password email
user client nickname card folder year initials region branch unit level mark
""".split()
STATES = """
new used open closed ready broken sold rented missing packed frozen ripe empty full booked late early clean dirty wet
dry hot cold active idle blocked planned done lost lent sealed printed checked drafted signed waiting gone away found
stolen damaged repaired painted loaded folded locked loose tight sharp blunt heavy light bright dark loud quiet fresh
stale raw baked young grown live dead warm cool soft hard thick thin wild tame plain fancy cheap dear rough smooth
public private secret known hidden shared alone valid void final draft pending queued paused running stopped charged
drained wrapped bare bent straight split whole torn mended faulty fine filed named numbered weighed measured tested
""".split()
STATE_FIELDS = "state status phase stage mode condition situation level class kind type sort grade form shape".split()
NUMBER_FIELDS = """
size weight points score miles hours years weeks months floor visits pages age days value count length height depth
width rank turns parts doors seats steps rings price cost fee
""".split()
FLAG_FIELDS = """
paid tested sealed public shared licensed fragile digital approved marked insured extended rare owned rented painted
printed signed stamped trusted checked locked frozen framed
""".split()
HOLDERS = "holder user keeper tenant member buyer client owner name person".split()
NAMES = """
Anna Bruno Carla David Elena Felix Greta Hugo Irene Jonas Klara Leo Marta Nico Olga Paul Rosa Simon Tilda Ugo Vera
Walter Xenia Yann Zoe Amir Bela Chloe Dora Emil Fatima Gina Hans Ines Jamal Karin Lars Mina Noah Otto Petra Rami Sofia
Tomas Uma Viktor Wanda Yusuf Alba Boris Celia Dario Esther Frida Gerd Heidi Igor Julia Kai Lina Moritz Nadia
""".split()
CHOICES = {  # what an act can be given, besides the thing
    "month": "January February March April May June July August September October November December".split(),
    "colour": "white black yellow brown purple orange pink silver golden violet grey ivory".split(),
    "city": "Paris Rome Oslo Cairo Lima Tokyo Delhi Berlin Madrid Dublin Athens Prague Vienna Boston Kyoto Quito".split(),
    "number": tuple(str(n) for n in range(2, 60)),
    "sum": tuple(range(5, 100, 5)) + tuple(range(100, 300, 10)),
    "place": tuple(
        f"{n} {word}" for n in range(1, 10) for word in ("Hill", "Lake", "Mill", "Park", "Bay", "Dale", "Road")
    ),
}
VERBS = """
swap mend paint renew lock clean rename print charge pause upgrade split share wrap store ship polish tune mark archive
close open copy lend sell weigh test block free list register insure label update bend bind bless boil boost bottle
brush build burn bury buy carve cast chain chop claim climb collect comb cook count cover crush cut deal dig drain draw
dress drop dry dust feed fetch file fill fix flip float fold frame freeze glue grade grease greet grow guard hang heat
hide hire hook hunt iron join judge keep knit land lay lease lift light limit link load measure melt merge mix mount nail
name order pack park paste patch pay peel pick pin plant play plug post pour pull pump push quote rate reset rest
return ring roll rub save scan scrub seal season serve sew shake shape sharpen shave shrink sign sketch slice sort
stamp steam sting stir stretch strip study sweep tag tape taste teach tie tow trade train treat trim turn twist vote wash
water wax weave wipe wire
""".split()
LOOKUPS = "find read fetch load check see open view get inspect examine pull_up".split()
LOGINS = "login sign_in identify check_person who_is authenticate admit greet recognise check_in prove welcome".split()
HAND_OVERS = (
    "call_human escalate hand_over pass_on get_manager ask_boss forward get_help delegate call_boss leave_it".split()
)
RECEIPTS = "code ticket number token reference stamp slip receipt proof tag note".split()
REASON_HEADS = """
too,not,out of,already,under,wrong,for,never,still,bad,no,locked,on,in a,past its,by,over the,at,half,fully,in the,
summer,winter,off the,only,at most,before,after,against,far from,more than,less than,without,behind the,last
""".replace("\n", "").split(",")
REASON_TAILS = """
old,allowed,season,sold,repair,class,far,heavy,members,today,twice,wet,tested,weather,space,paper,queue,time,letter,limit,
sea,empty,booked,north,ours,licence,list,use,noon,order,reach,stock,house,plan,road,way,border,law,budget,week,month,
three,four,rules,record,print,tune,shape,hand,date,hours
""".replace("\n", "").split(",")
COMPLAINTS = """
squeaky stained stuck cracked leaking noisy slow dull rusty wobbly faded scratched crooked jammed dusty greasy flat bald
chipped foggy sticky shaky dim blurry mouldy creaky dented frayed smelly sour
""".split()
PARTS = "dial lever knob switch handle pedal crank valve slider wheel button hatch flap plug lid key ring rod bar cord".split()
PART_COLOURS = ("", "", "white ", "black ", "yellow ", "left ", "right ", "upper ", "lower ", "red ", "green ", "blue ")
PART_VERBS = "turn pull flip push slide lift twist hit press tap squeeze open".split()
PANELS = "panel screen display dial light label monitor window gauge".split()

# Everyday words: any of them can stand for a thing, a verb, a state, ...: what a word means is for the policy to say.
EVERYDAY = """
parcel company customer deliver delivery address phone day days week month year hour age owner status value service
express basic sorting van depot insured delivered signed receipt locker door press red green blue ready broken lost late
early change named money back please sorry cannot done shall will need want came here new one yes no not yours only once
over under more than less first second third wrong right before after again other another somebody else nothing anything
something tell give ask say said show shows time way its from at on in to for with without of and or if then but so
because while until where when who what which why how many get set put take make do does did was were be been is are am
has have had you your we our they their he she his her him this that these those it there elsewhere twice rule rules
reason claim claims button buttons error unknown tool takes exactly must start help hello thank thanks bye goodbye okay
wait also too great fine sure exception possible sad bad lead leads nowhere pieces piece offer kind quick slow small
large big long short high low name keeps keep pin later up down any breaks use used
""".split()
# Words that the tokenizer holds whole as well: some begin sentences, the rest no conversation here has, as a
# tokenizer that was trained on more text would. The embeddings of those are drawn at the end of training.
CAPITALS = """
ID PIN READY OPEN E Yes No The A I It My Your Please Sorry What Which Done Hi Hello Thank Why Not Now Press Receipt Parcel
Phone Too Also Oh Error Tools You We If May Shall On Then First Wrong Change Cancel Value Broken Lost Late Only Any Another
Before Refuse Transfer Age New Oops
""".split()
UNUSED = """
verify cancel refund replace search transfer hold send look move unlock extend extended unlocked held cancelled refunded
replaced searched moved system assistant arguments
Monday Tuesday Wednesday Thursday Friday Saturday Sunday Elm Oak Ash Pine Birch Cedar Maple Willow Ada Ben Cleo Dan Eva
Finn Gus Hana Ivo Jill Kurt Lena
""".split()
