"""The worlds that tasks live in. Each is one file or folder here and fits episode.World."""

from __future__ import annotations

from minitau import parallel
from minitau.config import Domains, Episodes
from minitau.episode import World


def open_world(cfg: Domains) -> World:
    """The world that `cfg.env` names. tau2 is imported only when asked for."""
    if cfg.env == "courier":
        from minitau.envs.courier import Courier

        return Courier()
    from minitau.envs.tau2 import Tau2, read_policies

    policies = read_policies(cfg.policy, cfg.domains)
    if not isinstance(cfg, Episodes) or getattr(cfg, "agent", "policy") != "policy":
        return Tau2(policies=policies)  # nobody needs what asking a model needs
    return Tau2(
        user_model=cfg.user_model,
        user_api_base=addresses(cfg.user_api_base) or None,
        user_temperature=cfg.user_temperature,
        user_max_tokens=cfg.user_max_tokens,
        max_steps=cfg.max_steps,
        policies=policies,
    )


def addresses(given: str) -> str:
    """The customers' endpoints, of which each rank begins with another: few conversations are enough to ask all."""
    each = given.split(",")
    first = parallel.rank() % len(each)
    return ",".join(each[first:] + each[:first])


def origin(env: str) -> dict[str, str]:
    """Where tasks of a world come from, for whatever is made of them."""
    if env == "tau2":
        from minitau.envs.tau2 import COMMIT

        return {"env": env, "tau2_commit": COMMIT}
    return {"env": env}
