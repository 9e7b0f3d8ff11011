"""From rows to token ids: the column contract, prompts, contexts, wrong references."""
