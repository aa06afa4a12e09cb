"""The script `fedllm` and one module a command: parse, call, print.

In: a command line. Out: text, or JSON with --json; a FedllmError is one line and status 1.
`main` imports the chosen command alone. `options` holds what commands share: --run-config
(a file or pairs, over pyproject.toml), --clients, --out, --json and the form of errors.
A command has `parser()`, `run(args)` and `main(arguments)`, and a line in `main.COMMANDS`.
Logic belongs into the packages below; none of them imports this one.
"""
