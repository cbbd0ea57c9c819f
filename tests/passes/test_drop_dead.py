from mpqc.graph import Graph
from mpqc.passes.drop_dead import DropDead


def test_drops_what_reaches_no_output() -> None:
    before = Graph.parse(
        """
        %x = Input() : f32[1]
        %unused = Input() : f32[1]
        %c = Constant() {value=[1.0]} : f32[1]
        %y = Relu(%x) : f32[1]
        %dead = Add(%y, %c) : f32[1]
        %deader = Exp(%dead) : f32[1]
        return %y
        """
    )
    after = """
%x = Input() : f32[1]
%unused = Input() : f32[1]
%y = Relu(%x) : f32[1]
return %y
""".strip()
    assert str(DropDead()(before)) == after


def test_keeps_a_node_of_which_one_output_is_used() -> None:
    text = """
%x = Input() : f32[4]
%a, %b = Split(%x) {axis=0} : f32[2], f32[2]
return %b
""".strip()
    assert str(DropDead()(Graph.parse(text))) == text
