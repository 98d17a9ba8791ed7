"""Packed checkpoints: a folder of the size that the ledger says, which transformers opens after `import harness`.

model.safetensors            the packed tensors of each linear layer under `<layer>.<tensor>`, the rest in 16 bits;
(or numbered shards)         tied weights once
config.json                  the model's configuration, with a `quantization_config` that describes each layer
tokenizer.json, ...          the tokenizer
ledger.json, record.json     where each byte goes, and how the weights came about
SHA256SUMS                   of all files, as `sha256sum --check` reads it
"""
