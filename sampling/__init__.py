"""How a group comes about: prompts in, completions out."""
