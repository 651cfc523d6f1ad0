"""How many directions does fine-tuning need?"""
