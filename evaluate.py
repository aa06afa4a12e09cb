"""Ask a fine-tuned model, or measure it: `python evaluate.py --question "..."`."""

from fedllm.commands.evaluate import main

if __name__ == "__main__":
    main()
