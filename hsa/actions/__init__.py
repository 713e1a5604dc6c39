"""Operations that produce one output (merge, patch, apply), and merges of models in memory."""
