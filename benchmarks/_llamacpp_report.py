def report(records, start, *, quick):
    print({k: (v["bytes"], sum(v["kl"]) / len(v["kl"])) for k, v in records.items() if "kl" in v})
