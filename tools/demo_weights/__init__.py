"""The weights of the demo, made from nothing: `python run.py train-demo autoencoder`, then `base`, then `assemble`.

Data are the scenes that controlnext_training/synthetic.py draws. Everything is resumable: a stage that was stopped,
or whose process was killed, goes on from its last state in .cache/demo_weights, and a finished one is left alone.
"""
