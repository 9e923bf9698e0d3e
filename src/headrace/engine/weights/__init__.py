"""From model files to tensors: GGUF and safetensors; never pickle."""
