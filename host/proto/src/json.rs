//! Numbers of enumerations as their names in JSON.

use serde::Serializer;

use crate::{DataType, model_instance_group::Kind};

pub(crate) fn data_type<S: Serializer>(number: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(DataType::try_from(*number).unwrap_or_default().as_str_name())
}

pub(crate) fn kind<S: Serializer>(number: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(Kind::try_from(*number).unwrap_or_default().as_str_name())
}
