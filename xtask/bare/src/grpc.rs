//! The Open Inference Protocol over gRPC with nothing but tonic: `ModelInfer` gives its tensors back. It knows no models.

use modalkit_proto::{
    self as proto, ModelInferRequest, ModelInferResponse,
    grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer},
    model_infer_response::InferOutputTensor,
};
use tonic::{Request, Response, Status, codegen::tokio_stream};

/// Messages up to this.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

pub(crate) type Server = GrpcInferenceServiceServer<Bare>;

pub(crate) struct Bare;

pub(crate) fn server() -> Server {
    GrpcInferenceServiceServer::new(Bare).max_decoding_message_size(MESSAGE_BYTES_MAX)
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
    server_live(ServerLiveRequest) -> ServerLiveResponse;
    server_ready(ServerReadyRequest) -> ServerReadyResponse;
    model_ready(ModelReadyRequest) -> ModelReadyResponse;
    server_metadata(ServerMetadataRequest) -> ServerMetadataResponse;
    model_metadata(ModelMetadataRequest) -> ModelMetadataResponse;
    model_config(ModelConfigRequest) -> ModelConfigResponse;
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
