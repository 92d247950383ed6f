"""The Gradio pages, which speak to the gateway as any API client does."""
