//! Small graphs, written as ONNX files.

use std::{fs::File, path::Path};

use rten_onnx::onnx::{
    AttributeProto, AttributeType, DataType, Dimension, GraphProto, ModelProto, NodeProto,
    OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto, TypeProtoSequence, TypeProtoTensor,
    ValueInfoProto,
};

pub(super) use rten_onnx::onnx::DataType as Kind;

pub(super) const FLOAT32: Kind = DataType::FLOAT;
pub(super) const UINT16: Kind = DataType::UINT16;
pub(super) const STRING: Kind = DataType::STRING;
pub(super) const BFLOAT16: Kind = DataType::BFLOAT16;

/// The version of the operators.
const OPSET: i64 = 17;
/// Of the file's format.
const IR_VERSION: i64 = 8;

pub(super) struct Graph(GraphProto);

/// A size, or the name of one.
enum Size {
    Of(i64),
    Named(&'static str),
}

use Size::{Named, Of};

impl Graph {
    pub(super) fn write(&self, to: &Path) {
        let opset = OperatorSetIdProto { domain: None, version: Some(OPSET) };
        let model = ModelProto {
            ir_version: Some(IR_VERSION),
            graph: Some(self.0.clone()),
            opset_import: vec![opset],
            ..ModelProto::default()
        };
        model.write_file(File::create(to).expect("the folder is ours")).expect("it can be written");
    }
}

fn tensor_type(kind: Kind, sizes: &[Size]) -> TypeProto {
    let dim = |size: &Size| match size {
        Of(size) => Dimension { dim_value: Some(*size), ..Dimension::default() },
        Named(name) => Dimension { dim_param: Some((*name).to_owned()), ..Dimension::default() },
    };
    let shape = TensorShapeProto { dim: sizes.iter().map(dim).collect() };
    TypeProto {
        tensor_type: Some(TypeProtoTensor { elem_type: Some(kind), shape: Some(shape) }),
        ..TypeProto::default()
    }
}

fn value(name: &str, kind: Kind, sizes: &[Size]) -> ValueInfoProto {
    ValueInfoProto { name: Some(name.to_owned()), r#type: Some(tensor_type(kind, sizes)) }
}

fn node(operator: &str, name: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: Some(operator.to_owned()),
        name: Some(name.to_owned()),
        input: inputs.iter().map(|input| (*input).to_owned()).collect(),
        output: vec![output.to_owned()],
        ..NodeProto::default()
    }
}

fn floats(name: &str, dims: &[i64], values: Vec<f32>) -> TensorProto {
    TensorProto {
        name: Some(name.to_owned()),
        dims: dims.to_vec(),
        data_type: Some(DataType::FLOAT),
        float_data: values,
        ..TensorProto::default()
    }
}

fn whole_number(name: &str, value: i64) -> TensorProto {
    TensorProto {
        name: Some(name.to_owned()),
        data_type: Some(DataType::INT64),
        int64_data: vec![value],
        ..TensorProto::default()
    }
}

/// Ten rows: the row's number, and twice that.
fn table() -> TensorProto {
    floats("table", &[10, 2], (0..10_u8).flat_map(|row| [f32::from(row), 2.0 * f32::from(row)]).collect())
}

/// Rows of a table, chosen by `ids`; a mask that says nothing.
pub(super) fn tokens() -> Graph {
    tokens_with_mask("mask")
}

pub(super) fn tokens_with_mask(mask: &str) -> Graph {
    let sizes = || [Named("batch"), Named("seq")];
    Graph(GraphProto {
        node: vec![
            node("Cast", "wide", &["ids"], "wide_ids").with_int("to", i64::from(DataType::INT64.0)),
            node("Gather", "look_up", &["table", "wide_ids"], "vectors"),
        ],
        initializer: vec![table()],
        input: vec![value("ids", DataType::INT64, &sizes()), value(mask, DataType::INT64, &sizes())],
        output: vec![value("vectors", DataType::FLOAT, &[Named("batch"), Named("seq"), Of(2)])],
        value_info: Vec::new(),
    })
}

/// Rows of a table, chosen by `ids` and one more.
pub(super) fn sums() -> Graph {
    let one = whole_number("one", 1);
    Graph(GraphProto {
        node: vec![
            node("Add", "next", &["ids", "one"], "next_ids"),
            node("Gather", "look_up", &["table", "next_ids"], "vectors"),
        ],
        initializer: vec![table(), one],
        input: vec![value("ids", DataType::INT64, &[Named("batch"), Named("seq")])],
        output: vec![value("vectors", DataType::FLOAT, &[Named("batch"), Named("seq"), Of(2)])],
        value_info: Vec::new(),
    })
}

/// Each row and all before it, added.
pub(super) fn running_sum() -> Graph {
    let axis = whole_number("axis", 0);
    Graph(GraphProto {
        node: vec![node("CumSum", "sum", &["x", "axis"], "y")],
        initializer: vec![axis],
        input: vec![value("x", DataType::FLOAT, &[Named("rows"), Of(3)])],
        output: vec![value("y", DataType::FLOAT, &[Named("rows"), Of(3)])],
        value_info: Vec::new(),
    })
}

/// Each row, and its place from 1.
pub(super) fn places() -> Graph {
    let axis = whole_number("axis", 0);
    let number = |name: &str, value: f32| floats(name, &[1], vec![value]);
    Graph(GraphProto {
        node: vec![
            node("Mul", "nothing", &["x", "zero"], "zeros"),
            node("Add", "something", &["zeros", "one"], "ones"),
            node("CumSum", "count", &["ones", "axis"], "places"),
            node("Add", "place", &["x", "places"], "y"),
        ],
        initializer: vec![axis, number("zero", 0.0), number("one", 1.0)],
        input: vec![value("x", DataType::FLOAT, &[Named("rows"), Of(3)])],
        output: vec![value("y", DataType::FLOAT, &[Named("rows"), Of(3)])],
        value_info: Vec::new(),
    })
}

/// One input of one size, handed on.
pub(super) fn fixed() -> Graph {
    let port = |name| value(name, DataType::FLOAT, &[Of(1), Of(2)]);
    through("Identity", port("x"), port("y"))
}

/// A state whose second dimension is the batch's, times a number.
pub(super) fn scaled_state() -> Graph {
    let (front, middle) = (|| [Named("batch"), Of(2), Of(2)], || [Of(2), Named("batch"), Of(2)]);
    let turned = |node: NodeProto| node.with_ints("perm", &[1, 0, 2]);
    Graph(GraphProto {
        node: vec![
            turned(node("Transpose", "to_middle", &["state"], "turned")),
            node("Mul", "multiply", &["turned", "scale"], "scaled"),
        ],
        initializer: Vec::new(),
        input: vec![value("state", DataType::FLOAT, &front()), value("scale", DataType::FLOAT, &[])],
        output: vec![value("scaled", DataType::FLOAT, &middle())],
        value_info: Vec::new(),
    })
}

/// Inputs of three kinds, handed on.
pub(super) fn kinds() -> Graph {
    let sizes = || [Named("batch"), Of(2)];
    let hand_on = |name: &str| node("Identity", name, &[name], &format!("{name}_out"));
    Graph(GraphProto {
        node: vec![hand_on("half"), hand_on("double"), hand_on("truth")],
        initializer: Vec::new(),
        input: vec![
            value("half", DataType::FLOAT16, &sizes()),
            value("double", DataType::DOUBLE, &sizes()),
            value("truth", DataType::BOOL, &sizes()),
        ],
        output: vec![
            value("half_out", DataType::FLOAT16, &sizes()),
            value("double_out", DataType::DOUBLE, &sizes()),
            value("truth_out", DataType::BOOL, &sizes()),
        ],
        value_info: Vec::new(),
    })
}

/// One input of a kind, handed on.
pub(super) fn of_kind(kind: Kind) -> Graph {
    through("Identity", value("x", kind, &[Named("batch")]), value("y", kind, &[Named("batch")]))
}

pub(super) fn unknown_operator() -> Graph {
    let port = |name| value(name, DataType::FLOAT, &[Named("batch")]);
    through("Frobnicate", port("x"), port("y"))
}

pub(super) fn sequence() -> Graph {
    let mut input = value("x", DataType::FLOAT, &[]);
    let each = TypeProtoSequence { elem_type: Some(tensor_type(DataType::FLOAT, &[Named("length")])) };
    input.r#type = Some(TypeProto { sequence: Some(Box::new(each)), ..TypeProto::default() });
    through("SequenceLength", input, value("y", DataType::INT64, &[]))
}

fn through(operator: &str, input: ValueInfoProto, output: ValueInfoProto) -> Graph {
    Graph(GraphProto {
        node: vec![node(operator, "only", &["x"], "y")],
        initializer: Vec::new(),
        input: vec![input],
        output: vec![output],
        value_info: Vec::new(),
    })
}

trait WithAttribute {
    fn with_int(self, name: &str, value: i64) -> Self;
    fn with_ints(self, name: &str, values: &[i64]) -> Self;
}

impl WithAttribute for NodeProto {
    fn with_int(mut self, name: &str, value: i64) -> Self {
        self.attribute.push(AttributeProto {
            name: Some(name.to_owned()),
            i: Some(value),
            r#type: Some(AttributeType::INT),
            ..AttributeProto::default()
        });
        self
    }

    fn with_ints(mut self, name: &str, values: &[i64]) -> Self {
        self.attribute.push(AttributeProto {
            name: Some(name.to_owned()),
            ints: values.to_vec(),
            r#type: Some(AttributeType::INTS),
            ..AttributeProto::default()
        });
        self
    }
}
