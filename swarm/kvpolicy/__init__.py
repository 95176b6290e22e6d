"""KV compression as decisions and formats: which tokens are kept, in how many bits, when; and how that is measured.

A policy is a `KVPolicy` of swarm.kvpolicy.settings. swarm.kvpolicy.reference_cache holds all of it together in its
plainest form.
"""
