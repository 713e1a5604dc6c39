"""Models on the Hugging Face Hub: fetch what is needed of them, and keep it in a cache."""
