"""Kinds of adapter, one module a family; `fedllm.adapters` chooses between them.

| kind | trained | fixed, from the public seed | values a module | mean is exact |
|---|---|---|---|---|
| `ffa-lora` | B (out x r) | A (r x in), orthonormal | out * r | yes |
| `lora-core` | core (r x r), B = left @ core | left (out x r), A, orthonormal | r * r | yes |
| `lora` | A and B | - | (in + out) * r | no |
| `ia3` | factors of the outputs, or of the inputs | - | out, or in | yes |
| `vera` | lambda_b (out), lambda_d (r) | A, B, shared by all modules | out + r | no |

A family is a module with the same five functions: `first_arrays`, `peft_arrays`,
`peft_config`, `fix` and `parameter`. What a kind declares is in `spec.py`, which needs no
torch. Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685); FFA-LoRA, Sun et al. 2024 (arXiv
2403.12313); LoRA-XS, Balazy et al. 2024 (arXiv 2405.17604), which takes singular vectors
where we take random orthonormal ones; IA3, Liu et al. 2022 (arXiv 2205.05638); VeRA,
Kopiczko et al. 2023 (arXiv 2310.11454).
"""
