"""One client's part of a round: one message in, arrays or one code out.

Enters: a Flower message and the node's config. Leaves: trained values, or a code of a closed
list; the text of an error goes to the client's own log and, with privacy, nowhere else.
`message_handler` parses the config once (`node_config`), checks the run against it
(`node_limits`), takes the model and the rows from `cache`, and pays from `node_budget` (client
level) or, in `record_steps`, `record_budget`. Must not import `server` or `auditing`; torch,
TRL and `datasets` only inside functions.
"""
