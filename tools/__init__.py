"""Tools to run or develop the pack; the nodes need none of them.

Import name everywhere: `comfyui_controlnext.tools.<module>`, after running `_alias.py`. `environment`, `host`, `cli`
and `launcher` import only the standard library, because they run before anything is installed.
"""
