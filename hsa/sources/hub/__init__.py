"""Models on the Hugging Face Hub: what is needed of them, fetched and kept in a cache."""
