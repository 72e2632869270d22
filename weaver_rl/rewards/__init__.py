"""Rewards: users' scripted functions, run in killable processes. Nothing here knows Ray, the policy or the loss."""
