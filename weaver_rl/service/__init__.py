"""A self-hosted Weaver: what a server of training and sampling does, whatever the wire protocol and the cluster."""
