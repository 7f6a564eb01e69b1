"""Courier: the embedded domain, a parcel company with three desks. Everything runs with no download.

`desk` changes parcels, `claims` pays for broken and lost ones (often it must not), `locker`
is dual control: only the customer can press the buttons. As in tau2, the tools enforce types and
ids, not the policy: what the agent may do is its own choice, and the grader compares the final
database with the one that the right choices leave behind. In reading order:

    words.py     the words that all share, and the records Wish and Agenda
    tools.py     the policy, the tools and what they change
    tasks.py     draws each task, and the calls that serve it, from the task's name
    customer.py  the scripted customer
    agents.py    the scripted agents: gold, flawed, refuse, transfer
    world.py     puts them together: an episode, its grader, and the three domains

Each of the middle four knows words.py only.
"""

from minitau.envs.courier.world import Courier

__all__ = ["Courier"]
