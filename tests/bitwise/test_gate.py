"""The gate sees what changes a number, and nothing that only names things."""

from tests.bitwise.gate import DENSE, compare, fingerprint, normalized, program_of


def test_names_are_not_numbers():
    ours = """module @jit_step attributes {x} {
  func.func public @main(%arg0: tensor<f32>) -> (tensor<f32> {jax.result_info = "[0].params['w']"}) {
    %0 = func.call @_where(%arg0) : (tensor<f32>) -> tensor<f32>
    %1 = func.call @"clip 2"(%0) : (tensor<f32>) -> tensor<f32>"""
    theirs = (
        ours.replace("jit_step", "jit_other").replace("_where", "choose_7").replace('"clip 2"', "bounded")
    )
    assert normalized(ours) == normalized(theirs.replace("params['w']", "weights['w']"))
    assert normalized(ours) != normalized(ours.replace("@_where", '@"clip 2"'))
    assert normalized(ours) != normalized(ours.replace("f32", "bf16"))


def test_a_changed_constant_is_another_program():
    assert fingerprint(program_of(DENSE)) != fingerprint(program_of((*DENSE, "model.norm_eps=2e-6")))


def test_values_are_compared_where_there_is_something_to_compare_with():
    golden = {"programs": {"dense": "a"}}
    assert compare(golden, "programs", "dense", "a", write=False) == "equal"
    assert compare(golden, "programs", "dense", "b", write=False) == "DIFFERS"
    assert compare(golden, "programs", "moe", "a", write=False) == "no golden"
    assert compare(golden, "figures", "dense", ["0x1p0"], write=True) == "written"
    assert compare(golden, "figures", "dense", ["0x1.0000000000001p0"], write=False) == "DIFFERS"
