"""Reports: documents of blocks, rendered to HTML and Markdown, and the style of figures."""
