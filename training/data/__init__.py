"""Readers of pictures, texts and conversations, and generated scenes: whatever the stages are fed with."""
