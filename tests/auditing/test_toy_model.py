"""The audit's own base model."""

from fedllm.auditing.toy_model import save_toy_model
from fedllm.models.loading import load_base, load_tokenizer
from fedllm.models.location import load_config


def test_it_loads_as_any_base_model_and_its_tokenizer_knows_every_text(tmp_path):
    folder = tmp_path / "model"

    save_toy_model(folder, "{% for m in messages %}{{ m['content'] }}{% endfor %}")

    tokenizer = load_tokenizer(str(folder))
    assert load_config(str(folder)).vocab_size == len(tokenizer) == 257
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "\U0001f9ec ok"}], tokenize=False
    )
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == "\U0001f9ec ok"
    model = load_base(str(folder), 0, tmp_path, "cpu")
    assert sum(p.numel() for p in model.parameters()) < 20_000
