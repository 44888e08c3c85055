"""Pictures in prompts: what a model's family makes of them, and the model of the demo that sees."""
