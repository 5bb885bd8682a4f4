"""Documents of blocks, and the HTML and Markdown made of them; knows nothing about optimizers."""
