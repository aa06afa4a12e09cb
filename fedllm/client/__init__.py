"""One client's part of a round: one message in, arrays or one code out.

In: a Flower message, and the node's config as `NodeConfig`. Out: trained values, or a code
of a closed list; the text of an error goes to the client's own log.
`message_handler` -> `cache` -> (`preload`, `log`); `node_config` and `record_budget` lie
at the foot. Must not import: fedllm.server, fedllm.auditing.
"""
