"""The local stack: Ray head, MLflow server and the two system applications, as one session.

One module per noun; `up` and `down` are the verbs that use them all. Nothing here knows what a
model is.

    from cluster.session.up import up
    up(load_settings(), print)
"""
