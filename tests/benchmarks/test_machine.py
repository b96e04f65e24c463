from scripts.benchmarks.machine import facts


def test_facts_name_the_machine():
    found = facts("cpu")
    assert found["cores"] >= 1
    assert {"cpu", "python", "jax", "torch", "cpu flags"} <= set(found)
    assert found["jax"][0].isdigit()
