"""A client that makes everything anew for every message.

The manner is that of FlowerTune's example: for each message load the base model, quantise
it to 4 bit, put LoRA on it, format and tokenise the partition, build a trainer, take the
steps, and send every LoRA factor back in float32. The example's own defaults make it slower
still: gradient checkpointing (`gradient-checkpointing`) and rank 32 (`rank`).
"""

import tempfile

import torch
from datasets import load_dataset
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

app = ClientApp()


def load_model(config):
    """Load the base, quantise it, and put a fresh LoRA on it."""
    base = AutoModelForCausalLM.from_pretrained(
        str(config["model"]),
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16
        ),
    )
    base = prepare_model_for_kbit_training(
        base, use_gradient_checkpointing=bool(config["gradient-checkpointing"])
    )
    lora = LoraConfig(
        r=int(config["rank"]),
        lora_alpha=float(config["alpha"]),
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora)


def load_partition(config, node):
    """Return this client's rows as conversations, of which the answer is trained.

    TRL renders them by the model's template, so the tokens are those of fedllm's clients.
    """
    rows = load_dataset("json", data_files=str(config["rows"]).split(","))["train"]
    share = rows.shard(int(node["num-partitions"]), int(node["partition-id"]))
    return share.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["instruction"]}],
            "completion": [{"role": "assistant", "content": row["response"]}],
        },
        remove_columns=share.column_names,
    )


@app.train()
def train(message: Message, context: Context) -> Message:
    """Load, quantise, build, train, send."""
    config = context.run_config
    model = load_model(config)
    tokenizer = AutoTokenizer.from_pretrained(str(config["model"]))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=int(config["batch-size"]),
                max_steps=int(config["local-steps"]),
                max_length=int(config["max-length"]),
                learning_rate=1e-4,
                gradient_checkpointing=bool(config["gradient-checkpointing"]),
                bf16=False,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=load_partition(config, context.node_config),
            processing_class=tokenizer,
        )
        loss = trainer.train().training_loss
    state = {k: v.float() for k, v in get_peft_model_state_dict(model).items()}
    content = RecordDict(
        {
            "arrays": ArrayRecord(state),
            "metrics": MetricRecord({"train-loss": loss, "num-examples": 1}),
        }
    )
    return Message(content, reply_to=message)
