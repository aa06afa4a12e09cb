"""Ways that were measured, made up."""

from fedllm.planning.measured_ways import (
    ALONE,
    CLIENT,
    JOINT,
    THEN_PERSONAL,
    MeasuredWay,
)


def way(name, clients, rows, epsilon, *losses):
    return MeasuredWay(
        way=name,
        clients=clients,
        rows=rows,
        epsilon=epsilon,
        test_losses=losses,
        command="make",
    )


KNOWN = [
    way(ALONE, 20, 243, None, 2.4, 2.5),
    way(ALONE, 100, 48, None, 2.6),
    way(ALONE, 300, 16, None, 2.9),
    way(JOINT, 20, 243, 8.0, 2.35),
    way(JOINT, 20, 243, 2.0, 2.42),
    way(JOINT + THEN_PERSONAL, 20, 243, 8.0, 2.3),
    way(CLIENT, 20, 243, 8.0, 2.75),
    way(CLIENT, 100, 48, 8.0, 2.5),
]
