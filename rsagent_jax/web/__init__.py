"""The demo in a browser: its page on Gradio, and what a visitor of it has."""
