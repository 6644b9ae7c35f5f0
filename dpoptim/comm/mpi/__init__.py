"""The one folder that calls MPI: messages, waited for or asked for while a rank computes."""

__all__: list[str] = []
