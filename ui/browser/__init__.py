"""The Gradio pages. They speak to the gateway as any API client does."""
