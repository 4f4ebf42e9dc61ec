"""Scores of folders of pictures made for prompts."""
