"""Where a run runs: SuperLink, SuperNode, simulation, keys and the machine's checks.

In: a machine and its settings. Out: Flower's own programs, started with them; certificates;
findings. The two apps take `ray_walls` from here and nothing else. Flower is not
reimplemented; `guarded_client.py` alone replaces two of its functions, in a client's
process. Must not import: commands, and no client or server logic but the imports that the
fork server pays once. `fork_client.py` runs by its path, without site packages.
"""
