"""One run, seen from the server.

Enters: the run config, Flower's grid, a run id. Leaves: a run folder with adapters,
metrics.jsonl, privacy.json and result.json. `startup.set_up` returns a ready
`federation.Federation`, whose `run` is the round loop; `privacy_account` counts what is
spent for each unit of privacy. Replies are read without trust (`wire`), combined by
`strategy`, and never kept. Must not import `client`, nor anything that a client's row
could pass through.
"""
