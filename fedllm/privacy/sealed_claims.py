"""What a sealed run claims, and what it leaves out, in words that every unit shares."""

_NOT_COVERED = [
    "the server, if more than {colluding} of a round's trustees are on its side: with all of "
    "them it reads each update",
    "an app that a node's owner did not choose, and trustees' keys that the server brought: "
    "each node checks both, for itself alone",
    "a trustee put back to an older state of its disk, which opens a slot twice",
    "an attacker who breaks AES-256, or what the seeds are sealed with: the epsilon is against "
    "computers as they are",
    "that a client clips: one that does not cannot learn of the others, but can move the "
    "model by much more than the clipping norm, or spoil a round, and is not named",
]


def sealed_not_covered(colluding: int) -> list[str]:
    """Return what the promise of a sealed run leaves out, the server first.

    Args:
        colluding: c, how many trustees may tell the server their noise.
    """
    return [text.format(colluding=colluding) for text in _NOT_COVERED]


def whom_sealed(trustees: int, colluding: int) -> str:
    """Return against whom the epsilon of a sealed run is, up to "this run released".

    Args:
        trustees: k, the most that open a round.
        colluding: c.
    """
    return (
        f"whoever controls the server, all other clients and at most {colluding} of the "
        f"{trustees} trustees, and receives what"
    )


def opened_by_trustees(adapters: str, trustees: int, colluding: int) -> str:
    """Return how a sealed run keeps its promise, and what ends it, as a statement's end.

    Args:
        adapters: The epsilon for whoever sees only the adapters.
        trustees: k.
        colluding: c.
    """
    return (
        f"for whoever sees only the adapters epsilon is {adapters}. What the server "
        "received of a client was encrypted; it could add such values and open none: "
        f"only their sum was opened, by all trustees of a round together, at most {trustees}, "
        "each of whom added its share of the noise first. If all of them join the server "
        f"there is no protection, and if more than {colluding} do, less; what else is not "
        "covered is listed beside this under not_covered."
    )
