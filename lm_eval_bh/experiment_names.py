"""What experiments and their files are called."""

from __future__ import annotations

import hashlib

SWEEP_SETTINGS = "sweep.json"  # in the folder of every sweep
LONGEST_NAME = 200  # bytes of an experiment's name: endings follow, and file systems allow 255


def dataset_name(task: str) -> str:
    """Return the data set of one of our tasks: ``bh_wikitext`` -> ``wikitext``."""
    return task.removeprefix("bh_")


def configuration_name(rule: str, max_k: int, alpha: float | None) -> str:
    """Return the name of a configuration, as the earlier prototype built it.

    Examples
    --------
    >>> configuration_name("bh", 8, 0.4)
    '8experts_bh_a040'
    >>> configuration_name("topk", 8, None)
    '8experts_topk_baseline'
    """
    if rule == "topk" or alpha is None:
        return f"{max_k}experts_{rule}_baseline"
    digits = f"{alpha:.2f}" if round(alpha, 2) == alpha else f"{alpha:.10f}".rstrip("0")
    return f"{max_k}experts_{rule}_a{digits.replace('.', '')}"


def experiment_name(rule: str, max_k: int, alpha: float | None, task: str) -> str:
    """Return the name of an experiment: a configuration on a task.

    Examples
    --------
    >>> experiment_name("bh", 8, 0.4, "bh_wikitext")
    '8experts_bh_a040_wikitext'
    """
    return shortened(f"{configuration_name(rule, max_k, alpha)}_{dataset_name(task)}")


def shortened(name: str) -> str:
    """Return a valid file name: the name itself, or its beginning and a digest."""
    whole = name.encode()
    if len(whole) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(whole).hexdigest()[:16]
    return f"{whole[: LONGEST_NAME - 17].decode(errors='ignore')}-{digest}"


def is_file_name(name: str) -> bool:
    """Return whether a name is a plain file or folder name, without a path."""
    return (
        name not in ("", ".", "..")
        and not {"/", "\\", "\0"} & set(name)
        and len(name.encode(errors="surrogatepass")) <= 255
    )
