"""The base model: a small Qwen3 that takes turns, writes JSON, reads a tool list and copies.

It is pre-trained on conversations of made-up service desks, each with tools, rules and records of its
own, drawn without end. None of them is courier. In reading order:

    words.py     the words of the made-up world, and the numbers that it may use
    policy.py    what a domain is made of, and the policy that states it in sentences
    domains.py   draws a domain: its things, tools and rules
    talk.py      draws a conversation of a domain's customer with an agent that goes by the policy
    pretrain.py  the tokenizer, the training loop, and the scores on held-out domains
"""
