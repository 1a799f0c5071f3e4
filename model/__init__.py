"""The network: one decoder in plain PyTorch, its loss, its initialisation, and the bridge to Hugging Face."""
