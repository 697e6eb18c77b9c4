"""Training of the demo's weights from nothing: `python run.py train-demo`, or one stage after the other.

`autoencoder`, `decoder`, `base` and `ship-base` make the base; `style` a LoRA for it; `controls` what the recipes
demo_*.toml say, on the base as it ships, with controlnext_training; `ship-controls` keeps both. Data are the scenes
that controlnext_training/synthetic.py draws. Everything is resumable: a stage that was stopped, or whose process was
killed, goes on from its last state in .cache/demo_weights, and a finished one is left alone.
"""
