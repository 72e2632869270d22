"""`weaver-rl plan`: a recorded run, the real controller in virtual time, and what other set-ups would do. No Ray.

- `virtual_loop`   an event loop whose time jumps; the tests of the fleets run on it too
- `trace`          what a run folder says: lengths, times, who waited; `differences`: for whom it can speak
- `occupancy`      who computed when, and so what each role's seconds would have been alone (`machine`, `cores`)
- `costs`          what each role's work costs, fitted to that (`engine_fit`, `least_squares`)
- `recording`      which recorded step and group each simulated one repeats
- `simulated_*`    roles in which only time passes, as their costs say (`work`)
- `simulation`     one set-up: the real controller, stream, fleets and sync in front of simulated roles; its limits
- `sweep` `table`  many set-ups, the best of them, and what is printed
"""
