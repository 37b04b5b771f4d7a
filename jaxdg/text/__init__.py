"""CLIP's text: tokenizer and text towers."""
