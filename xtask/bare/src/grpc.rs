//! The Open Inference Protocol over gRPC with nothing but tonic: `ModelInfer` gives its tensors back. It knows one model, and says of it what perf_analyzer
//! wants to know before it asks.

use modalkit_proto::{
    self as proto, ModelInferRequest, ModelInferResponse,
    grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer},
    model_infer_response::InferOutputTensor,
};
use tonic::{Request, Response, Status, codegen::tokio_stream};

/// The tensors that it says it takes and gives, each of any length: those of the fixture that the host serves beside it.
const TENSORS: [(&str, &str, proto::DataType); 2] =
    [("values", "FP32", proto::DataType::TypeFp32), ("words", "BYTES", proto::DataType::TypeString)];
/// Messages up to this.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

pub(crate) type Server = GrpcInferenceServiceServer<Bare>;

pub(crate) struct Bare;

pub(crate) fn server() -> Server {
    GrpcInferenceServiceServer::new(Bare).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

fn metadata(name: String) -> proto::ModelMetadataResponse {
    let tensor =
        |(name, datatype, _): (&str, &str, proto::DataType)| proto::model_metadata_response::TensorMetadata {
            name: name.to_owned(),
            datatype: datatype.to_owned(),
            shape: vec![-1, -1],
        };
    proto::ModelMetadataResponse {
        name,
        versions: vec!["1".to_owned()],
        platform: "bare".to_owned(),
        inputs: TENSORS.map(tensor).into(),
        outputs: TENSORS.map(tensor).into(),
    }
}

fn config(name: String) -> proto::ModelConfig {
    proto::ModelConfig {
        name,
        platform: "bare".to_owned(),
        max_batch_size: 1,
        input: TENSORS
            .map(|(name, _, kind)| proto::ModelInput {
                name: name.to_owned(),
                data_type: kind.into(),
                dims: vec![-1],
                ..Default::default()
            })
            .into(),
        output: TENSORS
            .map(|(name, _, kind)| proto::ModelOutput {
                name: name.to_owned(),
                data_type: kind.into(),
                dims: vec![-1],
            })
            .into(),
        ..Default::default()
    }
}

macro_rules! nothing_else {
    ($($call:ident($request:ident) -> $response:ident;)*) => {
        #[tonic::async_trait]
        impl GrpcInferenceService for Bare {
            type ModelStreamInferStream = tokio_stream::Empty<Result<proto::ModelStreamInferResponse, Status>>;

            async fn model_infer(
                &self,
                request: Request<ModelInferRequest>,
            ) -> Result<Response<ModelInferResponse>, Status> {
                let request = request.into_inner();
                let described = |input: proto::model_infer_request::InferInputTensor| InferOutputTensor {
                    name: input.name,
                    datatype: input.datatype,
                    shape: input.shape,
                    ..InferOutputTensor::default()
                };
                Ok(Response::new(ModelInferResponse {
                    model_name: request.model_name,
                    model_version: "1".to_owned(),
                    id: request.id,
                    outputs: request.inputs.into_iter().map(described).collect(),
                    raw_output_contents: request.raw_input_contents,
                    ..ModelInferResponse::default()
                }))
            }

            async fn model_stream_infer(
                &self,
                _: Request<tonic::Streaming<ModelInferRequest>>,
            ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
                Err(Status::unimplemented("nothing but ModelInfer"))
            }

            async fn server_live(
                &self,
                _: Request<proto::ServerLiveRequest>,
            ) -> Result<Response<proto::ServerLiveResponse>, Status> {
                Ok(Response::new(proto::ServerLiveResponse { live: true }))
            }

            async fn server_ready(
                &self,
                _: Request<proto::ServerReadyRequest>,
            ) -> Result<Response<proto::ServerReadyResponse>, Status> {
                Ok(Response::new(proto::ServerReadyResponse { ready: true }))
            }

            async fn model_ready(
                &self,
                _: Request<proto::ModelReadyRequest>,
            ) -> Result<Response<proto::ModelReadyResponse>, Status> {
                Ok(Response::new(proto::ModelReadyResponse { ready: true }))
            }

            async fn server_metadata(
                &self,
                _: Request<proto::ServerMetadataRequest>,
            ) -> Result<Response<proto::ServerMetadataResponse>, Status> {
                Ok(Response::new(proto::ServerMetadataResponse {
                    name: "bare".to_owned(),
                    version: "1".to_owned(),
                    ..Default::default()
                }))
            }

            async fn model_metadata(
                &self,
                request: Request<proto::ModelMetadataRequest>,
            ) -> Result<Response<proto::ModelMetadataResponse>, Status> {
                Ok(Response::new(metadata(request.into_inner().name)))
            }

            async fn model_config(
                &self,
                request: Request<proto::ModelConfigRequest>,
            ) -> Result<Response<proto::ModelConfigResponse>, Status> {
                let config = Some(config(request.into_inner().name));
                Ok(Response::new(proto::ModelConfigResponse { config }))
            }

            $(
                async fn $call(
                    &self,
                    _: Request<proto::$request>,
                ) -> Result<Response<proto::$response>, Status> {
                    Err(Status::unimplemented("nothing but ModelInfer"))
                }
            )*
        }
    };
}

nothing_else! {
    model_statistics(ModelStatisticsRequest) -> ModelStatisticsResponse;
    repository_index(RepositoryIndexRequest) -> RepositoryIndexResponse;
    repository_model_load(RepositoryModelLoadRequest) -> RepositoryModelLoadResponse;
    repository_model_unload(RepositoryModelUnloadRequest) -> RepositoryModelUnloadResponse;
    system_shared_memory_status(SystemSharedMemoryStatusRequest) -> SystemSharedMemoryStatusResponse;
    system_shared_memory_register(SystemSharedMemoryRegisterRequest) -> SystemSharedMemoryRegisterResponse;
    system_shared_memory_unregister(SystemSharedMemoryUnregisterRequest) -> SystemSharedMemoryUnregisterResponse;
    cuda_shared_memory_status(CudaSharedMemoryStatusRequest) -> CudaSharedMemoryStatusResponse;
    cuda_shared_memory_register(CudaSharedMemoryRegisterRequest) -> CudaSharedMemoryRegisterResponse;
    cuda_shared_memory_unregister(CudaSharedMemoryUnregisterRequest) -> CudaSharedMemoryUnregisterResponse;
    trace_setting(TraceSettingRequest) -> TraceSettingResponse;
    log_settings(LogSettingsRequest) -> LogSettingsResponse;
}
