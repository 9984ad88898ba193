"""The command line: one file a verb.

app.py       the entry point: verbs, exit codes, what an error looks like
screen.py    where text, progress bars and the JSON object go
models.py    MODEL arguments -> Network
outputs.py   FILE and DIR arguments that will be written: refused early, never half-written
views.py     reports, networks and packages as tables for people
digits.py    the network and the data of `penjing demo`
passphrases.py  passphrases of keys: from a file, or asked for
compress.py evaluate.py deploy.py pack.py unpack.py inspect.py keygen.py sign.py verify.py encrypt.py decrypt.py demo.py
doctor.py    the verbs

Verbs import what is heavy (torch, the runtimes) inside their functions: `penjing --help` must answer at once.
"""
