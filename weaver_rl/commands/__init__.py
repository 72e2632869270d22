"""The commands, a file for each group of them: arguments in, the code that does the work imported inside.

Each file is registered in weaver_rl.cli.
"""
