"""The report of a run: one HTML file that needs neither a server nor a network, and the comparison of several runs.

`records` reads what a run wrote into its output folder, `page` and `comparison` make pages of it. `writer` is the part
of the training loop that writes the report and TensorBoard's events. Only `facts` and `writer` need MindSpore.
"""
