"""Tools for people who run or develop the pack; the nodes need none of this.

Import name everywhere: `comfyui_controlnext.tools.<module>`, after running `_alias.py`. `environment`, `host`, `cli`
and `launcher` import the standard library only, because they run before anything is installed.
"""
